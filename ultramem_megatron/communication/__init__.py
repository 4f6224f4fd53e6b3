"""Answers of other ranks, under way: issued, waited for, and computed beside."""

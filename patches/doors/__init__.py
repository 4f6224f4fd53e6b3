"""Callbacks that pretrain() lacks."""

"""What the memories of a trained model read: by token, by value, over the key grid, over time."""

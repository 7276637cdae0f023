"""What the commands do, one file a verb; none of them knows the terminal."""

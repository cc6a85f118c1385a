"""What leaves sparing, and what comes in from elsewhere: files other programs write or read."""

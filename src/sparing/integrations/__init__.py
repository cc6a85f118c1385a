"""Code for single frameworks, which their users need not call."""

"""A method's life: its stages, and what one hands to the next."""

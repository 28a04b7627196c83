"""What comes out: kept in a file or drawn; it knows not what made the arrays."""

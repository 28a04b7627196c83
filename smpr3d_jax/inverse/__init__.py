"""Where the two meet: from counts back to the specimen."""

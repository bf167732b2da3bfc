"""What the interpreters of other stores import too: the standard library only."""

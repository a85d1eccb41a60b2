"""Keys of older releases, translated into today's before sources are merged."""

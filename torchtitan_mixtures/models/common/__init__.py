"""Building blocks that several model families use unchanged; nothing here names a family."""

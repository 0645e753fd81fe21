"""One page that shows what runs left: `expunge report`. It needs their records, and no model."""

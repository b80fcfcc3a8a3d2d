"""From files to packed batches: blocks, order, packing, loading."""

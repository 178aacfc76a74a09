"""Records, tokens, images, shards, index, plan, packing, batches. Knows nothing of models or DeepSpeed."""

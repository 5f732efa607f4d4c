"""Everything for one shard, without Ray: read, explain, perturb, score, write; and the plain loop over shards."""

"""Planning of a run on a cluster: roles, bundles, memory and throughput."""

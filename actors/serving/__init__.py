"""Serving: vLLM engines, their Serve replicas, pools, routing and autoscaling."""

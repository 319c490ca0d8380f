"""Cost: FLOPs and bytes of plans, counted from a model's shape. Nothing is run."""

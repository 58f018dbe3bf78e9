"""Rule-based teacher: instruction data derived from captions and boxes without a model."""

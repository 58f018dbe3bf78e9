"""The teacher without a model: instruction data that follows from captions and boxes by rules."""

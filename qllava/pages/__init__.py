"""The pages of the demo: chat and comparison in the browser."""

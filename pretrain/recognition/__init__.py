"""Speech recognition with a trained run: text and word times of recordings."""

"""Speech synthesis without recursion: text tower, predictors, alignment, mel decoder and vocoder."""

"""How models/demo was made: corpus, tokeniser, training run, evaluation."""

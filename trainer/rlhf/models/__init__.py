"""Loading and saving models, tokenizers and training states; the scalar head."""

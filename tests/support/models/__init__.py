"""Small models and tokenizers, and the oracles for them."""

"""A load and its proofs: a server whose streams are right or wrong, and an oracle that says what each stream must be."""

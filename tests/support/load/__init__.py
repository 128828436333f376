"""A load and its proofs: a server whose streams are right or wrong, and one that says what each stream must be."""

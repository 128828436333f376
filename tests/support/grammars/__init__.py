"""Help for the tests of structured output: random schemas, a small vocabulary, texts drawn from masks alone."""

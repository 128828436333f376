"""Speculation without a second model: guesses of a sequence's next tokens, verified in the step that runs anyway.

A *draft* is a guess of a sequence's next tokens. Each draft token is computed as one more row of its sequence. Each row
is sampled with the random number of its own position, as without drafts. Draft tokens are accepted up to the first that
differs from the sampled token. So drafts change how many tokens a step gives, and never which tokens. This package uses
no clock, no randomness and no tensors. It may import `request`, `block_manager`, `step_share` and `constraints` of the
engine; the scheduler and the model runner import it. Start at `speculator.py`.
"""

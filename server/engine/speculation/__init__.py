"""Speculation without a second model: guesses of a sequence's next tokens, verified in the step that runs anyway.

A guess (a *draft*) is computed as further rows of its sequence. Each row samples with the noise of its own position, as
without drafts, and a draft token stays while it equals what was sampled: drafts change how many tokens a step gives,
never which. No clock, no randomness, no tensors. May import the engine's data (`request`, `block_manager`,
`step_share`); the scheduler and the model runner import it. Start at `speculator.py`.
"""

"""Checks of values in a body's fields for which a type is not enough, with their limits. One module per kind of value.

Error messages name limits, never the client's values. The modules may import the base exception and each other.
`generation.protocol` builds the bodies from them. Start with `base`, then `tokens`.
"""

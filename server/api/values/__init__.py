"""Values of a body's fields that take more than a type to check: what each may hold, and its limits.

One module for one kind of value. They read what a client sent and say what is wrong with it; what is done with a value
is not known here. Nothing is echoed: messages name limits, never values. May import the base exception and each other;
`generation.protocol` builds the bodies from them. Start with `base`, then `tokens`.
"""

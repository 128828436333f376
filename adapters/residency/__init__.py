"""Where each adapter version's weights are: host memory and device slots, as ledgers (integers) and stores (tensors).

The ledgers import no torch. Start with `host_table.py`, then `slot_table.py`.
"""

"""Where each adapter version's weights are: host memory and device slots, as ledgers (integers) and stores (tensors).

The ledgers import no torch. Start with `ledger.py`; `host_table.py` and `slot_table.py` are its parts.
"""

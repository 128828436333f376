"""The formats in which models write calls: one file each, and `registry`, which finds them by name.

A `CallFormat` says which texts may begin calls, and makes a `Candidate` for each beginning in the output. A candidate
reads the characters behind it, one by one, and decides whether they are calls. Imports only `call_object`.
"""

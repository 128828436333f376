"""The ways in which models write calls: one file each, and `registry`, which has them by name.

A `CallFormat` says which texts may begin calls and makes a `Candidate` for each beginning that is seen. A candidate
takes the characters behind it, one by one, and says what they are. Imports `call_object` alone.
"""

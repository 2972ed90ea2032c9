"""Random calls of every RPC, their messages made from the contract's descriptors: a new field is fuzzed as it comes."""

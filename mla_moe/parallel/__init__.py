"""The device mesh, the table of sharding rules, and computation over both: einsums, experts, processes."""

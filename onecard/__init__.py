"""The rooms of onecard: what the scripts at the root are built from. docs/design.md says where what stands."""

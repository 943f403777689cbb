"""Online stage: text over gRPC, through a bundle's graphs, to translations. Needs no torch."""

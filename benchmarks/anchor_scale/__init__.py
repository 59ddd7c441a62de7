"""What each source of anchors costs: arithmetic from measured figures, and the store at ten million sequences."""

"""What each source of anchors costs, by arithmetic from what was measured, and the store itself at ten million sequences."""

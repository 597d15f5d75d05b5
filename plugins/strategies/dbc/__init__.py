"""DBC: widths are learned together with the weights."""

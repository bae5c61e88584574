"""What a run needs of a GPU's memory, from shapes alone: neither weights nor a GPU are needed."""

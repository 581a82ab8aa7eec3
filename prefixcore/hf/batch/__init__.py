"""What the rows of a batch are: whose virtual tokens they have, how they are packed, where a prompt stands in them."""

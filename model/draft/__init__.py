"""The draft: a small network on the target's features that guesses ahead, with PAD-Rec's position-aware module."""

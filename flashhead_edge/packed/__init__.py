"""Bodies in 4 bits as people have them, read without torch. numpy only."""

"""What draws: fonts and colours, a page, panels. Of llava it imports `llava.errors` at most."""

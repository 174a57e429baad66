"""What the web page shows: uploads in, HTML out; app.py does the wiring."""

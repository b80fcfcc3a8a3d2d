"""What goes wrong and what to do about it: values in, values out, no Ray."""

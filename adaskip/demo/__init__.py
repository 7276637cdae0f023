"""The embedded demo: a small real vision-language model (`backbone`) and the questions it answers (`digits`)."""

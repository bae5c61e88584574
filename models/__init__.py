"""What a teacher or a student is: loading, denoisers, encoders and the embedded digits models."""

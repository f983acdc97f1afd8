"""Reading and writing video and images with the ffmpeg binary of `imageio-ffmpeg`; knows nothing of models."""

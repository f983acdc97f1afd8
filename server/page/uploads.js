// Files that are sent to the server before a video begins with them. Errors are in words.

async function post(address, file) {
  const answer = await fetch(address, { method: 'POST', body: file });
  const values = await answer.json();
  if (!answer.ok) throw new Error(values.error.message);
  return values;
}

/** Gives the picture's id. */
export async function sendPicture(file, { max_image_bytes: most }) {
  if (file.size > most) throw new Error(`A picture may have ${most >> 20} MB.`);
  return (await post('/v1/images', file)).id;
}

/** What a settings file asks for: prompt, prompt_changes, seed, settings, and the name of a picture. */
export function readSchedule(file) {
  return post('/v1/schedules', file);
}
